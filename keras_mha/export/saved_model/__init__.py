"""SavedModels for TF Serving, and what accompanies them."""
