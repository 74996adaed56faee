"""Optimisation: ``configure_optimizers`` as a plain value, and the small acts of one optimizer step. Floor 2."""
