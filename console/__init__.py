"""The console: a web page to ask the models of a server from. Start it with scripts/console."""
