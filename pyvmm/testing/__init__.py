"""The meaning of a run: verdicts, reports on the console, JUnit, configuration files; and machines
for tests.
"""
