"""Questions whose answers are computed from segmentations of real scans."""
