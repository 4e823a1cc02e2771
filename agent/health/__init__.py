"""What the host says about itself."""
