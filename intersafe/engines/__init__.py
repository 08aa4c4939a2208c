"""What inference engines need and report: arguments, weights, metrics, failures, logs."""
