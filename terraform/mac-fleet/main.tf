locals {
  # Relative to the user's home, where only that user reads.
  folder = ".drover-setup"
  setup = {
    for name, mac in var.macs : name => join("\n", concat(
      ["#!/bin/sh"],
      [for key, value in {
        ROLE          = "worker"
        SOURCE_URL    = var.source_url
        SOURCE_SHA256 = var.source_sha256
        HEAD          = var.head
        ADDRESS       = mac.address == "" ? mac.ssh_host : mac.address
        NAME          = name
        GRACE_S       = tostring(var.grace_s)
        OPTIONS = join(" ", concat(
          ["--slots ${mac.slots}"],
          [for feature in mac.features : "--feature ${feature}"],
        ))
        TOKEN_FILE = "ray-token"
      } : "export ${key}='${replace(value, "'", "'\\''")}'"],
      [file("${path.module}/../scripts/setup.sh")],
    ))
  }
}

# One for each Mac. It is set up again when its part of the configuration, or the version, is another one; a Mac that is
# taken out ends its builds and leaves. Arguments of provisioners are in no state.
resource "terraform_data" "mac" {
  for_each = var.macs
  input = {
    host     = each.value.ssh_host
    port     = each.value.port
    user     = each.value.user
    host_key = each.value.host_key
    key_file = var.private_key_file
    within_s = var.connect_within_s
  }
  triggers_replace = [sha256(local.setup[each.key])]

  connection {
    type        = "ssh"
    host        = self.input.host
    port        = self.input.port
    user        = self.input.user
    host_key    = self.input.host_key
    private_key = self.input.key_file == "" ? null : file(self.input.key_file)
    timeout     = "${self.input.within_s}s"
  }
  provisioner "remote-exec" {
    inline = ["umask 077 && mkdir -p ${local.folder} && chmod 700 ${local.folder}"]
  }
  provisioner "file" {
    source      = var.ray_token_file
    destination = "${local.folder}/ray-token"
  }
  provisioner "file" {
    content     = local.setup[each.key]
    destination = "${local.folder}/setup.sh"
  }
  provisioner "remote-exec" {
    inline = [
      "set -e",
      "cd ${local.folder}",
      "sudo -n true || { echo 'drover set-up: this user may not use sudo without a password' >&2; exit 1; }",
      # The token lies in /etc/drover from then on, readable by root alone.
      "sudo -n sh setup.sh || { rm -f ray-token; exit 1; }",
      "rm -f ray-token",
    ]
  }
  provisioner "remote-exec" {
    when   = destroy
    inline = ["sudo -n sh /opt/drover/terraform/scripts/leave.sh"]
  }
}
