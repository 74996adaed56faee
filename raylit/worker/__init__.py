"""What runs inside a worker process around the engine: entry, live channel, failures. Floor 4; never driver code."""
