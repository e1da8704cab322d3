"""Figures, the page of a comparison, the page of the gates."""
