# Hardening of the services, as in ../systemd: a test compares. There stands why a worker's is what it is.
{
  server = {
    NoNewPrivileges = "yes";
    CapabilityBoundingSet = "";
    AmbientCapabilities = "";
    LockPersonality = "yes";
    MemoryDenyWriteExecute = "yes";
    PrivateDevices = "yes";
    PrivateTmp = "yes";
    ProtectClock = "yes";
    ProtectControlGroups = "yes";
    ProtectHome = "yes";
    ProtectHostname = "yes";
    ProtectKernelLogs = "yes";
    ProtectKernelModules = "yes";
    ProtectKernelTunables = "yes";
    ProtectProc = "invisible";
    ProtectSystem = "strict";
    RemoveIPC = "yes";
    RestrictAddressFamilies = "AF_INET AF_INET6 AF_UNIX AF_NETLINK";
    RestrictNamespaces = "yes";
    RestrictRealtime = "yes";
    RestrictSUIDSGID = "yes";
    SystemCallArchitectures = "native";
    SystemCallErrorNumber = "EPERM";
    SystemCallFilter = "@system-service";
    UMask = "0077";
  };
  worker = {
    NoNewPrivileges = "yes";
    CapabilityBoundingSet = "CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER CAP_FSETID CAP_KILL CAP_NET_ADMIN CAP_SETGID CAP_SETUID CAP_SYS_ADMIN CAP_SYS_CHROOT";
    DeviceAllow = [ "/dev/kvm rw" "/dev/net/tun rw" ];
    DevicePolicy = "closed";
    PrivateTmp = "yes";
    ProtectClock = "yes";
    ProtectHome = "yes";
    ProtectKernelModules = "yes";
    ProtectSystem = "strict";
    RestrictAddressFamilies = "AF_INET AF_INET6 AF_UNIX AF_NETLINK";
    RestrictRealtime = "yes";
    SystemCallErrorNumber = "EPERM";
    SystemCallFilter = "~@clock @module @obsolete @raw-io @reboot @swap";
  };
}
