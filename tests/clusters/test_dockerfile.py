"""The image's recipe, by its instructions; nothing is built here."""

from __future__ import annotations

import re

from files import CLUSTERS, manifest

ROOT = CLUSTERS.parent


def instructions() -> list[tuple[str, str]]:
    """As Docker reads them: comments gone, continued lines joined."""
    lines = [x for x in (CLUSTERS / "Dockerfile").read_text().splitlines() if not x.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (x.partition(" ") for x in joined.splitlines() if x.strip())]


def test_the_base_is_pinned_and_the_user_is_not_root() -> None:
    found = instructions()
    assert {word for word, _ in found} <= {"FROM", "ENV", "RUN", "USER", "WORKDIR", "COPY", "ENTRYPOINT", "CMD"}
    [base] = [rest for word, rest in found if word == "FROM"]
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu\d\d\.\d\d", base)
    assert [rest for word, rest in found if word == "USER"] == ["trainer"]
    [made] = [rest for word, rest in found if word == "RUN" and "useradd" in rest]
    pod = manifest("kuberay/raycluster.yaml")["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert f"--uid {pod['securityContext']['runAsUser']} " in made


def test_every_install_is_constrained_and_nothing_secret_gets_in() -> None:
    found = instructions()
    installs = [part for word, rest in found if word == "RUN" for part in rest.split("&&") if "pip install" in part]
    assert installs
    assert all("-c constraints.txt" in part for part in installs)
    environment = " ".join(rest for word, rest in found if word == "ENV")
    assert not re.search(r"(token|secret|password|key)\w*=", environment.replace("RAY_AUTH_MODE=token", ""), re.I)
    assert "RAY_AUTH_MODE=token" in environment


def test_what_launcher_and_kuberay_call_is_there() -> None:
    [packages] = [rest for word, rest in instructions() if word == "RUN" and "apt-get install" in rest]
    assert {"openssl", "procps", "python3", "rsync", "wget"} <= set(packages.split())
    variables = " ".join(rest for word, rest in instructions() if word == "ENV").split()
    assert "HOME=/home/trainer" in variables, "Ray's launcher takes the home folder from here"


def test_what_is_copied_is_there_and_passes_dockerignore() -> None:
    sources = [
        source
        for word, rest in instructions()
        if word == "COPY"
        for source in [w for w in rest.split() if not w.startswith("--")][:-1]
    ]
    ignore = (CLUSTERS / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignore
    assert set(sources) == {line[1:] for line in ignore if line.startswith("!")}
    assert all((ROOT / source).exists() for source in sources)


def test_the_files_that_run_in_it_are_where_the_clusters_look() -> None:
    homes = [rest for word, rest in instructions() if word == "WORKDIR"]
    assert homes == ["/opt/elastictrain"]
    for name in ("aws.yaml", "gcp.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml"):
        for path in re.findall(r"/opt/elastictrain/(\S+?\.(?:py|sh|yaml))", (CLUSTERS / name).read_text()):
            at = ROOT / path if path.startswith("jobs/") else CLUSTERS / path
            assert at.exists(), (name, path)
