"""What a run means: verdicts, what the console says, JUnit, configuration files; and machines for
tests.
"""
