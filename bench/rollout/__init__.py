"""The roll-out beside a stock ansible.cfg, Mitogen and pyinfra, on hosts in containers."""
