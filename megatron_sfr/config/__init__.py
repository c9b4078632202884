"""From flags and recipes to what a run trains: settings, their validation, and the objects built from them."""
