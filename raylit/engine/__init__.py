"""The loops. Floor 3: no Ray, no files, no ``torch.distributed``; everything else arrives through ports."""
