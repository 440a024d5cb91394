"""What is counted about a policy: answers, rates with intervals, and the report of `test`."""
