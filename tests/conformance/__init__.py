"""The conformance suite: recorded scenarios of the real spring-retry, replayed through retrykit's public API."""
