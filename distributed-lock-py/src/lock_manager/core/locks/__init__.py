"""The replicated lock machine (machine.py), its commands, answers and views."""
