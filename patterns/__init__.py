"""The rules: which PyTorch expressions become which op."""
