"""What all five papers share and none of them claims: run folders, data, augmentation, probes, statistics, page."""
