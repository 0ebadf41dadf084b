"""Ray: worker and keeper actors, and the supervisor that performs what control decides."""
