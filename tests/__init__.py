"""The tests: behaviour over real HTTP on 127.0.0.1, invariants that each test tries to break."""
