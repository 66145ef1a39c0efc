"""Engines that turn prompts into text, behind the interface of ``requests.Engine``; one library a file."""
