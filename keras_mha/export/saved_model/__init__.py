"""SavedModels for TF Serving, and what stands beside them."""
