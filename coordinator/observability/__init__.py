"""What a farm shows to those who watch it: metrics, made from counters and views."""
