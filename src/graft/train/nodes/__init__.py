"""The nodes of a run and the ranks on them: looked at before training (inspection.py), watched while it lasts (watch.py)."""
