"""The one place where the version is written: the build, the native library and the CLI read it from here."""

__version__ = "0.1.0.dev0"
