"""A PyTorch Lightning model zoo of differentiable mechanisms."""
