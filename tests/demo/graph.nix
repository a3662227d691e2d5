# Some 40 derivations on two systems, with nothing but the sandbox's /bin/sh: what a small package set looks like
# to a farm. Diamonds, several outputs, an output that refers to another, a fixed output that two different
# derivations make, and a step that only a worker with the feature `large-memory` may build.

let
  source = builtins.toFile "hello.c" "int main(void) { return 0; }\n";

  for = system:
    let
      step = name: { needs ? [ ], script ? "", outputs ? [ "out" ], features ? [ ], seconds ? "0.3" }:
        derivation {
          inherit name system outputs needs;
          builder = "/bin/sh";
          requiredSystemFeatures = features;
          args = [
            "-c"
            ''
              set -eu
              echo '@nix {"action":"setPhase","phase":"buildPhase"}' >&2
              echo "building ${name} for ${system}"
              sleep ${seconds}
              mkdir -p $out
              for need in $needs; do echo "$need" >> $out/needs; done
              ${script}
            ''
          ];
        };

      # One fixed output and two ways to it: everything above may collapse.
      tarball = mirror: derivation {
        name = "hello-1.0.tar";
        inherit system;
        builder = "/bin/sh";
        args = [ "-c" "echo fetching from ${mirror}; printf 'the source of hello\\n' > $out" ];
        outputHashMode = "flat";
        outputHashAlgo = "sha256";
        outputHash = builtins.hashString "sha256" "the source of hello\n";
      };

      toolchain = step "toolchain-13" { script = "echo ${source} > $out/cc"; seconds = "0.6"; };
      library = name: extra: step name ({ needs = [ toolchain ]; } // extra);
      zlib = library "zlib-1.3" { };
      xml = library "libxml2-2.12" { needs = [ toolchain zlib ]; };
      ssl = library "openssl-3.3" {
        outputs = [ "out" "dev" "doc" ];
        script = ''
          mkdir -p $dev $doc
          echo "$out" > $dev/libs
          echo "manual" > $doc/openssl.txt
        '';
      };
      curl = library "curl-8.9" { needs = [ ssl.dev zlib ]; };
      python = library "python3-3.12" { needs = [ ssl.dev zlib xml ]; features = [ "large-memory" ]; seconds = "0.8"; };
      git = library "git-2.46" { needs = [ curl zlib ssl.out ]; };
      helloFrom = mirror: step "hello-1.0" { needs = [ toolchain (tarball mirror) ]; };
      app = n: step "app-${toString n}" { needs = [ zlib (if n / 2 * 2 == n then curl else xml) ]; };
      apps = map app [ 1 2 3 4 5 6 7 8 ];
    in
    step "everything" {
      needs = apps ++ [
        git
        python
        ssl.doc
        (helloFrom "https://mirror-a.example/hello-1.0.tar")
        (helloFrom "https://mirror-b.example/hello-1.0.tar")
      ];
    };
in
{
  linux = for "x86_64-linux";
  darwin = for "aarch64-darwin";
}
