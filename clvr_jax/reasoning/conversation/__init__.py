"""The conversation of the loop: replies of the controller, the history that models read, and the two roles."""
