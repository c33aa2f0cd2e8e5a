"""Code that all five papers share: run folders, data, augmentation, probes, statistics and the results page."""
