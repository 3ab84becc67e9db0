"""The published protocols and numbers."""
