"""The backends' own attention kernels, one file each."""
