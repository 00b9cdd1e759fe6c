"""Judging synthetic images: label, copies, fidelity, and the gate that puts the verdicts together."""
