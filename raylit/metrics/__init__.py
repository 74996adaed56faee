"""What ``Module.log`` becomes: values a step, values an epoch, the history. Worker side; imports no sibling."""
