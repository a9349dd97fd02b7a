"""Calibration texts of quantisers and pruners: does every expert get enough of them, and which
texts are enough."""
