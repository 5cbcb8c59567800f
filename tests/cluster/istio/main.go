// istiod and istioctl in one program, chosen by its first argument: nothing here but their own entry points.
package main

import (
	"fmt"
	"os"

	istioctl "istio.io/istio/istioctl/cmd"
	discovery "istio.io/istio/pilot/cmd/pilot-discovery/app"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: istio istiod|istioctl FLAGS")
		os.Exit(2)
	}
	program := os.Args[1]
	os.Args = append(os.Args[:1], os.Args[2:]...)
	switch program {
	case "istiod":
		if err := discovery.NewRootCommand().Execute(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case "istioctl":
		if err := istioctl.GetRootCmd(os.Args[1:]).Execute(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(istioctl.GetExitCode(err))
		}
	default:
		fmt.Fprintf(os.Stderr, "no program %q\n", program)
		os.Exit(2)
	}
}
