"""Training state as named logical tensors (pure): what is stored, moved and resharded, whatever the layout."""
