"""The conversion of directories as a stream: its plan, its execution, and its report."""
