"""The one exception that training and packaging show to the user as a plain line."""


class UserError(Exception):
    """Something the user can mend: bad data, a wrong option, a file that is not there. The message says how."""
