"""`microadam-memory`: what a model and its optimizer need on a device.

Nothing else in the package imports this.
"""
