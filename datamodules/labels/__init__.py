"""Labels in every form that files hold, and which of them are doubtful."""
