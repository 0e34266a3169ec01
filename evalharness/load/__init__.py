"""Load: streaming users against a served model, with true latencies from raw samples."""
