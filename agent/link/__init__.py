"""The MQTT link: desired and reported state, events, commands."""
