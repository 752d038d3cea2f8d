"""Bridges to other people's trainers; each module names the optional extra that it needs."""
