"""Plans what fits on the device and what stays in host memory."""
