"""What servers that share one index do: leases, commands between them, and loops that one takes over from another."""
