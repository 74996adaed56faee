"""The caller's side of a run: connection to Ray, launching, live events. Floor 5; never engine code."""
