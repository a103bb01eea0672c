"""`Probe.log` inside other people's training loops, one file a library, each imported only when it is used."""
