# No provider: Macs are given, and joined over ssh.
terraform {
  required_version = ">= 1.9"
}
