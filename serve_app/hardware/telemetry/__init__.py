"""Readings of GPUs, CPUs and NPUs from sysfs, hwmon and DRM fdinfo, testable on a fake tree."""
