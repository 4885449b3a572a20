"""What a run means: verdicts, what the console says, JUnit, configuration files. Nothing here boots
anything.
"""
