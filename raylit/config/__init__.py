"""The Trainer's arguments as checked, plain values. Floor 0: standard library only; Ray's own objects are only read."""
