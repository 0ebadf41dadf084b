"""What is known of a run: its journal, and the ledger, report and MLflow record folded from it."""
